"""How it is spread: everything that knows Ray. Imports engine, never jobs."""
