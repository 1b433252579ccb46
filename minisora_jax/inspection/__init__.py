"""Show a data set, a packing, a run or a model as a table and a picture (`minisora inspect`)."""
