"""What can be known before any rank starts work: the run plan, its checks, memory and cost."""
