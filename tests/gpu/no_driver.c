/* What a CUDA build of torch asks of the driver before it runs a backward pass on fake tensors, where there is no GPU. */
static int devices = 0;
void stub_devices(int count) { devices = count; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "there is no driver"; return 0; }

/* c10::cuda::device_count() and device_count_ensure_non_zero(), which torch's own libraries look up by these names */
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
signed char _ZN3c104cuda28device_count_ensure_non_zeroEv(void) { return 1; }
