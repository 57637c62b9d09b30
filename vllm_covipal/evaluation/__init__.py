"""Generated tasks and what is measured on them."""
