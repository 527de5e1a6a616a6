"""One file per method: paper, formula, where each default comes from, parameters, mathematics."""
