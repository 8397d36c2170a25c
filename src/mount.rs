//! The device, mounted by the kernel.
