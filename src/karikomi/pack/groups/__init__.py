"""Groups of tensors that are coded together: which ones, by which codec, and how."""
