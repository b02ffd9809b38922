/** placeholder */
console.log(WORKER.length, KERNEL.length);
