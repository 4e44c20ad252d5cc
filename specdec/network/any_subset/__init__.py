"""Any-subset models (XLNet): tokens in any order, two streams with kept keys."""
