"""The strategy for a small set of labelled images: look at the data, plan, let arms compete, report honestly."""
