"""One module a paper: configuration, training, evaluation and the experiments of its chapter."""
