"""Tables, layers and gates that stages need, computed from a model and pictures.

A method is a module like a command's (see `vtoken.cli`), with a `SUMMARY` besides.
"""
