"""What a person types or submits: one thin module a stage, and the command line."""
