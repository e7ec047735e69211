"""Readers: the files of a data set format to a split of image records."""
