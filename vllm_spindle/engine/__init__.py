"""Everything that knows vLLM: specs, managers, backends, the worker's reduction, metrics."""
