"""Windows: blocks of training at a constant learning rate, merged in place of annealing."""
