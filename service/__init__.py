"""The service: `kms.Kms` is every operation without HTTP; protocols, identity and the command line stand around it."""
