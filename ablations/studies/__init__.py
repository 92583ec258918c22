"""The studies that come with mmphi, one small file each."""
