import os

# Read when a kernel module is imported: kernels run interpreted, unless TRITON_INTERPRET=0 asks for a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
