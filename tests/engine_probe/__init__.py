"""What scenarios use inside their child process to drive and watch a real engine; needs vLLM."""
