"""What a cache is and whether it is whole: ``info``, ``ls``, ``head``, ``verify``."""
