"""Tables, layers and gates that stages need, computed from a model and pictures.

A method is a module with `SUMMARY`, `DESCRIPTION`, `EXAMPLES`, `Settings` (its options), `OUT` (the file it writes) and
`run(args)`.
"""
