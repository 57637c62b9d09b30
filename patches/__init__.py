"""The only places where we change vLLM's own objects: one file per hook, each guarded.

A patch opens a hook and holds no policy; ``vllm_spindle.plugin`` and ``vllm_spindle.processes``
fill the hooks. None is applied in a process that has no use for it. The ledger, with the reason
of each and what would let it go, is ``patches/README.md``.

Importing this package changes nothing: every patch has an ``apply`` that is safe to call twice.
"""
