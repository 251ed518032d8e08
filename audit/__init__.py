"""What happened, in order: one sealed chain of records per writer, and the means to check it offline.

`audit.event` and `audit.chain` are pure; `audit.log` is the only writer; `audit.verify` is `skms-verify`. Nothing is
imported here, so that the verifier reaches neither a database nor a web library.
"""
