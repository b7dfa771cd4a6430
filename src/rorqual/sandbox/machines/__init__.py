"""What virtual machines are made of: kernels, initial file systems, root images, and the VMMs' command lines and APIs.

Nothing here starts or ends anything: substrates/microvm.py and substrates/fullvm.py do, through the keeper.
"""
