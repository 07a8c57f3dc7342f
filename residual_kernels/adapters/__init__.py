"""The adapters: how is a method built, put around a tower, attached, folded away, kept and shared?"""
