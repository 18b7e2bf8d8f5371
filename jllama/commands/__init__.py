"""The commands of `jllama`: each module has `add_arguments(parser)` and `run(args)`."""
