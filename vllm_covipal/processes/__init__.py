"""What vLLM is told to start in its own processes: composition roots, chosen by class name.

Imported only when covipal is switched on.
"""
