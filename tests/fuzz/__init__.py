"""Random differentiable programs, planned and compared with what they are compared with by hand."""
