"""`partwise find-lr`: the learning rate of each part, by a range test on a copy of the model.

sweep.py trains with a rate that grows, suggest.py reads the losses, report.py shows and writes what it says.
"""
