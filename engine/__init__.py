"""What is computed: pure numerics and file formats, with no knowledge of Ray, DeepSpeed or the command line."""
