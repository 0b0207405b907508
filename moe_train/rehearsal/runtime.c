/* The CUDA runtime and driver calls that torch makes itself, on host memory.

   Preloaded before torch's libraries, this makes torch's own CUDA code run without a device:
   its caching allocator, streams, events, generators, pinned memory and copies. Work is done
   at once, in the order of the calls. No kernel can be launched: every launch is an error.

   A library without symbol versions satisfies versioned references (ld.so), so one file serves
   CUDA 12 and 13. Its name is libcuda.so.1, so that torch finds it where it looks for the driver. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_FUNCTION = 98, INVALID_DEVICE = 101 };
enum { HOST = 1, DEVICE = 2 };
enum { DEVICE_TO_HOST = 2, MOST_DEVICES = 64 };

static __thread int current_device, last_error;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[MOST_DEVICES];

static struct { long launches, synchronizations, copies_to_host; } counted;

long rehearsal_launches(void) { return counted.launches; }
long rehearsal_synchronizations(void) { return counted.synchronizations; }
long rehearsal_copies_to_host(void) { return counted.copies_to_host; }

static long setting(const char *name, long standard) {
  const char *text = getenv(name);
  return text ? atol(text) : standard;
}
static int devices(void) {
  long count = setting("MOE_TRAIN_REHEARSAL_DEVICES", 1);
  return count > MOST_DEVICES ? MOST_DEVICES : (int)count;
}
static size_t capacity(void) { return (size_t)setting("MOE_TRAIN_REHEARSAL_BYTES", 1l << 33); }
/* What others hold of a device is not to be had. */
static size_t available(void) { return (size_t)setting("MOE_TRAIN_REHEARSAL_AVAILABLE", (long)capacity()); }
static int failed(int error) { return last_error = error; }

/* Devices. */

int cudaGetDeviceCount(int *count) { *count = devices(); return SUCCESS; }
int cudaGetDevice(int *device) { *device = current_device; return SUCCESS; }
int cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return failed(INVALID_DEVICE);
  current_device = device;
  return SUCCESS;
}
int cudaDriverGetVersion(int *version) { *version = 13020; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = 13020; return SUCCESS; }
int cudaGetLastError(void) { int error = last_error; last_error = SUCCESS; return error; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(int error) { (void)error; return "rehearsal"; }
const char *cudaGetErrorString(int error) {
  switch (error) {
    case SUCCESS: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_DEVICE: return "invalid device ordinal";
    case INVALID_FUNCTION: return "a kernel was launched, and a rehearsal has no device";
    default: return "not part of a rehearsal";
  }
}
int cudaDeviceSynchronize(void) { counted.synchronizations++; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int one, int other) { (void)one; (void)other; *can = 0; return SUCCESS; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0; /* compute capability 9.0, processors */
  return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *text, int length, int device) { return snprintf(text, length, "0000:%02x:00.0", device) < 0; }

/* The beginning of cudaDeviceProp, which CUDA 13 and 12 share but for one field; torch hands in
   zeros. */
struct head {
  char name[256], uuid[16], luid[8];
  unsigned node_mask;
  size_t total, shared;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
};
struct tail13 { size_t constant; int major, minor; size_t texture, texture_pitch; int processors; };
struct properties13 { struct head head; struct tail13 tail; };
struct properties12 { struct head head; int clock; struct tail13 tail; };

static void describe(struct head *head, struct tail13 *tail) {
  const char *name = getenv("MOE_TRAIN_REHEARSAL_NAME");
  snprintf(head->name, sizeof head->name, "%s", name ? name : "rehearsal");
  head->total = capacity();
  head->warp = 32;
  head->threads = 1024;
  tail->major = 9;
  tail->processors = 132;
}
int cudaGetDeviceProperties(struct properties13 *p, int device) { (void)device; describe(&p->head, &p->tail); return SUCCESS; }
int cudaGetDeviceProperties_v2(struct properties12 *p, int device) { (void)device; describe(&p->head, &p->tail); return SUCCESS; }

/* Memory: pages of the host that cost nothing until they are written, counted per device. */

struct block { char *start; size_t bytes; int device, kind; struct block *next; };
static struct block *blocks;

static int reserve(size_t bytes, int device) {
  int fits = used[device] + bytes <= available();
  if (fits) used[device] += bytes;
  return fits;
}

static int take(void **pointer, size_t bytes, int kind) {
  int error = OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  if (kind == HOST || reserve(bytes, current_device)) {
    void *start = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
      struct block *block = malloc(sizeof *block);
      *block = (struct block){start, bytes, current_device, kind, blocks};
      blocks = block;
      *pointer = start;
      error = SUCCESS;
    } else if (kind == DEVICE) used[current_device] -= bytes;
  }
  pthread_mutex_unlock(&lock);
  return error ? failed(error) : SUCCESS;
}
static int give(void *pointer) {
  int error = pointer ? INVALID_VALUE : SUCCESS;
  pthread_mutex_lock(&lock);
  for (struct block **at = &blocks; *at; at = &(*at)->next)
    if ((*at)->start == pointer) {
      struct block *block = *at;
      *at = block->next;
      munmap(block->start, block->bytes ? block->bytes : 1);
      if (block->kind == DEVICE) used[block->device] -= block->bytes;
      free(block);
      error = SUCCESS;
      break;
    }
  pthread_mutex_unlock(&lock);
  return error ? failed(error) : SUCCESS;
}
int cudaMalloc(void **pointer, size_t bytes) { return take(pointer, bytes, DEVICE); }
int cudaFree(void *pointer) { return give(pointer); }
int cudaMallocHost(void **pointer, size_t bytes) { return take(pointer, bytes, HOST); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { (void)flags; return take(pointer, bytes, HOST); }
int cudaFreeHost(void *pointer) { return give(pointer); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = capacity();
  *free_bytes = available() - used[current_device];
  return SUCCESS;
}
struct attributes { int kind, device; void *on_device, *on_host; };
int cudaPointerGetAttributes(struct attributes *found, const void *pointer) {
  const char *place = pointer;
  memset(found, 0, sizeof *found);
  pthread_mutex_lock(&lock);
  for (struct block *block = blocks; block; block = block->next)
    if (place >= block->start && place < block->start + block->bytes)
      *found = (struct attributes){block->kind, block->device, (void *)place, (void *)place};
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static void copy(void *to, const void *from, size_t bytes, int kind) {
  if (kind == DEVICE_TO_HOST) counted.copies_to_host++;
  memmove(to, from, bytes);
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { copy(to, from, bytes, kind); return SUCCESS; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  (void)stream;
  copy(to, from, bytes, kind);
  return SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, void *stream) {
  (void)there; (void)here; (void)stream;
  memmove(to, from, bytes);
  return SUCCESS;
}
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return SUCCESS; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { (void)stream; memset(to, value, bytes); return SUCCESS; }

/* Segments of the caching allocator that grow (expandable_segments): addresses first, then
   memory piece by piece. */

struct handle { size_t bytes; int device; };
struct location { int kind, id; };
struct creation { int kind, handles; struct location location; };

int cuMemAddressReserve(void **pointer, size_t bytes, size_t alignment, void *hint, unsigned long long flags) {
  (void)alignment; (void)hint; (void)flags;
  void *start = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return OUT_OF_MEMORY;
  *pointer = start;
  return SUCCESS;
}
int cuMemAddressFree(void *pointer, size_t bytes) { return munmap(pointer, bytes) ? INVALID_VALUE : SUCCESS; }
int cuMemCreate(struct handle **handle, size_t bytes, const struct creation *how, unsigned long long flags) {
  (void)flags;
  pthread_mutex_lock(&lock);
  int fits = reserve(bytes, how->location.id);
  pthread_mutex_unlock(&lock);
  if (!fits) return OUT_OF_MEMORY;
  *handle = malloc(sizeof **handle);
  **handle = (struct handle){bytes, how->location.id};
  return SUCCESS;
}
int cuMemRelease(struct handle *handle) {
  pthread_mutex_lock(&lock);
  used[handle->device] -= handle->bytes;
  pthread_mutex_unlock(&lock);
  free(handle);
  return SUCCESS;
}
int cuMemMap(void *pointer, size_t bytes, size_t offset, void *handle, unsigned long long flags) {
  (void)offset; (void)handle; (void)flags;
  return mprotect(pointer, bytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : SUCCESS;
}
int cuMemSetAccess(void *pointer, size_t bytes, const void *access, size_t count) {
  (void)pointer; (void)bytes; (void)access; (void)count;
  return SUCCESS;
}
int cuMemUnmap(void *pointer, size_t bytes) {
  madvise(pointer, bytes, MADV_DONTNEED);
  return mprotect(pointer, bytes, PROT_NONE) ? INVALID_VALUE : SUCCESS;
}
int cuMemGetAllocationGranularity(size_t *bytes, const void *how, int option) { (void)how; (void)option; *bytes = 1 << 21; return SUCCESS; }

/* Streams and events: all that was queued is done. */

static int stream(void **made) { *made = malloc(1); return SUCCESS; }
int cudaStreamCreate(void **made) { return stream(made); }
int cudaStreamCreateWithFlags(void **made, unsigned flags) { (void)flags; return stream(made); }
int cudaStreamCreateWithPriority(void **made, unsigned flags, int priority) { (void)flags; (void)priority; return stream(made); }
int cudaStreamDestroy(void *made) { free(made); return SUCCESS; }
int cudaStreamQuery(void *made) { (void)made; return SUCCESS; }
int cudaStreamSynchronize(void *made) { (void)made; counted.synchronizations++; return SUCCESS; }
int cudaStreamWaitEvent(void *made, void *event, unsigned flags) { (void)made; (void)event; (void)flags; return SUCCESS; }
int cudaStreamGetPriority(void *made, int *priority) { (void)made; *priority = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *made, int *status) { (void)made; *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *made, int *status) { (void)made; *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *made, int *status) { (void)made; *status = 0; return SUCCESS; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { (void)mode; return SUCCESS; }
int cudaLaunchHostFunc(void *made, void (*function)(void *), void *data) { (void)made; function(data); return SUCCESS; }

int cudaEventCreateWithFlags(void **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof(struct timespec)); return SUCCESS; }
int cudaEventCreate(void **event) { return cudaEventCreateWithFlags(event, 0); }
int cudaEventDestroy(void *event) { free(event); return SUCCESS; }
int cudaEventQuery(void *event) { (void)event; return SUCCESS; }
int cudaEventSynchronize(void *event) { (void)event; counted.synchronizations++; return SUCCESS; }
int cudaEventRecord(void *event, void *made) { (void)made; return clock_gettime(CLOCK_MONOTONIC, event); }
int cudaEventRecordWithFlags(void *event, void *made, unsigned flags) { (void)flags; return cudaEventRecord(event, made); }
int cudaEventElapsedTime(float *milliseconds, struct timespec *from, struct timespec *to) {
  *milliseconds = (to->tv_sec - from->tv_sec) * 1e3f + (to->tv_nsec - from->tv_nsec) * 1e-6f;
  return SUCCESS;
}

/* Kernels: nothing here could run one. */

static int launch(void) { counted.launches++; return failed(INVALID_FUNCTION); }
int cudaLaunchKernel(void) { return launch(); }
int __cudaLaunchKernel(void) { return launch(); }
int cudaLaunchKernelExC(void) { return launch(); }
int cuLaunchKernel(void) { return launch(); }
int cuLaunchCooperativeKernel(void) { return launch(); }

/* The driver, as far as torch calls it. */

int cuInit(unsigned flags) { (void)flags; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0; *active = 1; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuCtxSetCurrent(void *context) { (void)context; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = cudaGetErrorString(error); return SUCCESS; }

static int unsupported(void) { return 801; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  (void)version; (void)flags;
  void *known = dlsym(RTLD_DEFAULT, name);
  *function = known ? known : (void *)unsupported;
  if (status) *status = 0;
  return SUCCESS;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

/* NVML, which the allocator asks about links before it maps memory; libnvidia-ml.so.1 is a link to
   this library. Zeros stand for no fabric. */

int nvmlInit(void) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(int *count) { *count = devices(); return SUCCESS; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) { (void)bus; *device = (void *)1; return SUCCESS; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count) { (void)device; *count = 0; return SUCCESS; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { (void)device; (void)info; return SUCCESS; }

/* Symbols that libraries of torch want to find when they are loaded. */
#define UNSUPPORTED(name) int name(void) { return unsupported(); }
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlSystemGetCudaDriverVersion_v2)
UNSUPPORTED(cuFuncGetAttribute)
UNSUPPORTED(cuFuncSetAttribute)
UNSUPPORTED(cuFuncSetCacheConfig)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuModuleGetFunction)
UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleLoadData)
UNSUPPORTED(cuModuleLoadDataEx)
UNSUPPORTED(cuModuleUnload)
UNSUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cuPointerGetAttribute)
UNSUPPORTED(cuTensorMapEncodeTiled)
