"""The studies that come with mmphi, one file each."""
