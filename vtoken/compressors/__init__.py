"""More than choosing: merge, retire, sparsify, shrink. One method per file."""
