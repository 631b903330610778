"""What the operations run on: the choice of an implementation, chips, checks, launches, compilation ahead of time."""
