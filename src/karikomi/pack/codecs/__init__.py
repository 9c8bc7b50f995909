"""Integer codecs of the packed file."""
