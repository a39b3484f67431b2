"""Tools for people who look at a server: what they read, and the tables they print. Nothing here needs torch."""
