"""Everything of covipal that imports vLLM."""
