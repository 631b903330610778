"""What both adapters share and no engine is needed for: a checkpoint, a step, a layer, a chat."""
