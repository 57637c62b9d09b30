"""What vLLM is told to start in its own processes: composition roots, chosen by class name.

Each module opens the hooks that its process needs, then adds our adapter to vLLM's class. They
are imported only when spindle is switched on.
"""
