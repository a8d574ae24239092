"""What the files of other families mean here: names of tensors, order of rows, keys, grids."""
