"""The exact decomposition: which contributions is an embedding the sum of, and how are they kept on disk?"""
