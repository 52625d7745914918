"""What ranks that share one loss exchange: collectives, and which part of a split vocabulary or sequence is whose."""
