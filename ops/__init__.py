"""The operator: the command `wardround`."""
