"""What a folder is and where it comes from.

fingerprint.py knows files and weights by their content, manifest.py writes and reads partwise.json, and
publish.py makes a folder appear at once. What training saves is decided in training/checkpoint.py.
"""
