"""Cost model: seconds of compute, links, collectives, pipeline and step."""
