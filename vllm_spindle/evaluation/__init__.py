"""Task generators and scoring: what a reduced cache is measured on."""
