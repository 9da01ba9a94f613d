"""Pure functions and operators, one idea a file; no word of federation, no file, no network."""
