//! Loop devices by their ioctls (`linux/loop.h`, loop(4)), without the help of losetup.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use linux_raw_sys::loop_device::{
    LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, LOOP_GET_STATUS64, loop_config, loop_info64,
};
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};

use crate::units::BLOCK_SIZE;

// linux/loop.h has these as an enumeration.
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another process may take the free device that we were told of.
const ATTEMPTS: usize = 64;

/// A loop device on a file of ours. The kernel takes it down when its last user closes it: a filesystem mounted on it, this process
/// unless it let go, another that holds it.
#[derive(Debug)]
pub(super) struct LoopDevice {
    number: u32,
    path: PathBuf,
    /// The device number of the filesystem that its file is in. No other device has it, whatever number it gets, as long as the
    /// filesystem is there.
    filesystem: u64,
    /// None after it was let go of.
    device: Option<File>,
}

/// `LOOP_CTL_GET_FREE`: the number comes as the call's result.
struct GetFree;

// SAFETY: the request takes no argument and writes no memory; its result is a small number.
#[allow(unsafe_code)]
unsafe impl Ioctl for GetFree {
    type Output = u32;
    const IS_MUTATING: bool = false;
    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }
    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<u32> {
        u32::try_from(out).map_err(|_| rustix::io::Errno::INVAL)
    }
}

impl LoopDevice {
    /// A read-only device of 4096-byte blocks over `file` in `filesystem`, which it reads around the page cache; `label` is what
    /// `losetup -l` may show.
    pub(super) fn attach(file: impl AsFd, label: &str, filesystem: u64) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut attempt = 0;
        loop {
            attempt += 1;
            // SAFETY: `GetFree` describes the request as the kernel defines it.
            #[allow(unsafe_code)]
            let number = unsafe { ioctl(&control, GetFree) }?;
            let path = path_of(number);
            let device = open(&path)?;
            match configure(&device, &file, label) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {}
                Err(error) => return Err(error),
                Ok(()) => {
                    return Ok(Self {
                        number,
                        path,
                        filesystem,
                        device: Some(device),
                    });
                }
            }
        }
    }

    /// Device `number`, which is there already, with its descriptor if it is to be held.
    pub(super) fn resume(number: u32, device: Option<OwnedFd>, filesystem: u64) -> Self {
        Self {
            number,
            path: path_of(number),
            filesystem,
            device: device.map(File::from),
        }
    }

    /// A duplicate of the descriptor, as long as it was not let go of.
    pub(super) fn held(&self) -> io::Result<Option<OwnedFd>> {
        let duplicate = |device: &File| device.try_clone().map(OwnedFd::from);
        self.device.as_ref().map(duplicate).transpose()
    }

    /// Closes the descriptor.
    pub(super) fn let_go(&mut self) {
        self.device = None;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Takes the file away from the device; when another process has the device open the kernel does it at their close.
    pub(super) fn detach(self) -> io::Result<()> {
        let Self {
            path,
            filesystem,
            device,
            ..
        } = self;
        let device = match device {
            Some(device) => device,
            // While it is open here it stays what it is.
            None => match open(&path) {
                Ok(device) => device,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        // What was let go of may be gone, and its number another device's by now.
        if filesystem_of(&device) != Some(filesystem) {
            return Ok(());
        }
        // SAFETY: the request takes no argument.
        #[allow(unsafe_code)]
        let cleared = unsafe { ioctl(&device, NoArg::<LOOP_CLR_FD>::new()) };
        match cleared {
            // Taken down by another process (losetup -d): that is what was wanted.
            Ok(()) | Err(rustix::io::Errno::NXIO) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn path_of(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn open(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path);
    opened.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The device number of the filesystem that the file behind `device` is in; `None` when there is no file.
fn filesystem_of(device: &File) -> Option<u64> {
    // SAFETY: the request writes a `loop_info64`, which is what it gets room for; every pattern of bits is one.
    #[allow(unsafe_code)]
    let status = unsafe { ioctl(device, Getter::<LOOP_GET_STATUS64, loop_info64>::new()) };
    status.ok().map(|status| status.lo_device)
}

fn configure(device: &File, file: &impl AsFd, label: &str) -> io::Result<()> {
    let mut name = [0u8; 64];
    let shown = &label.as_bytes()[..label.len().min(name.len() - 1)];
    name[..shown.len()].copy_from_slice(shown);
    let fd = file.as_fd().as_raw_fd();
    let config = loop_config {
        fd: u32::try_from(fd).map_err(io::Error::other)?,
        block_size: u32::try_from(BLOCK_SIZE).map_err(io::Error::other)?,
        info: loop_info64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            lo_file_name: name,
            lo_crypt_name: [0; 64],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        },
        __reserved: [0; 8],
    };
    // SAFETY: the request reads a `loop_config`, which is what it gets, and writes nothing.
    #[allow(unsafe_code)]
    unsafe { ioctl(device, Setter::<LOOP_CONFIGURE, loop_config>::new(config)) }.map_err(io::Error::from)
}

/// Whether loop device `number` has a file behind it.
pub(super) fn is_attached(number: u32) -> bool {
    backing_file(number).is_some()
}

/// The file behind loop device `number`, as the kernel names it.
pub(super) fn backing_file(number: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    Some(text.trim_end().to_owned())
}
