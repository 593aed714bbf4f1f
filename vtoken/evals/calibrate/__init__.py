"""Tables that stages read, computed from a model and pictures. A method is a module with `SUMMARY`, `add_arguments(parser)` and `run(args) -> int`;
all take --json and say what they found through `_report`."""
