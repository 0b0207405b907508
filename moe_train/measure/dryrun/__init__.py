"""The real full-size model and step of any rank on fake tensors: memory known before launch."""
