"""What the API and the worker both need."""
