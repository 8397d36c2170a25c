//! temporary
mod support;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tarblk::device::{Device, DeviceOptions, volume::Volume};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let backend = args.get(1).map_or("loop", |s| s.as_str());
    let dir = std::env::temp_dir();
    let path = dir.join(format!("probe{}.ext4", std::process::id()));
    support::make_ext4(&path, 16);
    let (image, bytes) = support::patchwork(&path, false, Some(Duration::from_millis(1)));
    let volume = Arc::new(Volume::new(image, bytes, 3));
    let t = Instant::now();
    let options = DeviceOptions {
        backend: backend.parse().unwrap(),
        ..Default::default()
    };
    let (device, why) = Device::start(&volume, &options).unwrap();
    println!("{} in {:?} {:?}", device.path().display(), t.elapsed(), why);
    let t = Instant::now();
    let got = support::read_all(device.path());
    println!("read {} in {:?}", got.len(), t.elapsed());
    assert!(got == support::read_all(&path));
    println!("{}", serde_json::to_string(&volume.stats()).unwrap());
    let t = Instant::now();
    device.stop().unwrap();
    println!("stopped in {:?}", t.elapsed());
    std::fs::remove_file(path).unwrap();
}
