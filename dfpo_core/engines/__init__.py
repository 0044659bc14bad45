"""Training engines: what turns a loss into new weights. One interface: backward, step, state_dict, load_state_dict, gathered."""
